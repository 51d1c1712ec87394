"""State in files, and the host buffers that it passes through."""
