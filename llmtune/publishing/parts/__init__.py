"""What a card is made of: pictures, scores, hardware and .gguf files."""
