"""Where training state lives, and all that changes it."""
