"""What a machine can compute: tensors in, tensors out.

The lowest floor. It knows no file, no model and no engine, and imports nothing above itself.
"""
