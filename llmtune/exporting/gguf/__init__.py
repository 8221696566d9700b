"""GGUF: the file that llama.cpp reads, written with the parts that the gguf package keeps, and its proof."""
