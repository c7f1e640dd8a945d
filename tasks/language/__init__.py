"""Language tasks: texts classified, or answered by a decoder, from files or the hub."""
