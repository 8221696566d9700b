"""Line charts: scales from values to pixels, and their drawing as SVG."""
