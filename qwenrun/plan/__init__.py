"""The plan: every buffer a run holds, from config, recipe and run. The calculator is the engine's own list."""
