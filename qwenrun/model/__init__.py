"""The model: its configuration, the list of its tensors, and its graph. Knows no file format and no session."""
