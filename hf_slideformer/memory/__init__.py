"""Memory: page-aligned host buffers, unit layouts, GPU slots, and the lanes that copy between them."""
