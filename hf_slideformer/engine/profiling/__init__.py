"""What a model needs and computes, without running it."""
