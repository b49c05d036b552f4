"""What is stored and how it is made: formats, recipes, the pack, the quantizer.

The middle floor. It knows tensor names and shapes but no model graph, and stands on `qwenrun.kernels` alone.
"""
