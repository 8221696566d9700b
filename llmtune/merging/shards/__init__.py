"""A merge that never holds a whole model: parts of it are read, changed, compared and written one by one."""
