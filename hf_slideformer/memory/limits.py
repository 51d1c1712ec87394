"""Limits: sizes and counts that the engine keeps to and the planner counts on."""

# Blocks of torch's CUDA allocator.
BLOCK_BYTES = 512

# Pages of host buffers and of files, and what direct I/O moves.
PAGE_BYTES = 4096

# Units' gradients, and offloaded inputs, on their way from the device before the compute stream waits for the oldest.
COPIES_IN_FLIGHT = 2

# Inputs that are on their way back from RAM while a unit runs backward.
INPUTS_COMING = 2

# Host buffers for inputs that go to disk, and as many for those that come back.
INPUT_BUFFERS = 2

# What a checkpoint's writer holds of a tensor on the GPU, and its reader of weights.
CHECKPOINT_PIECE_BYTES = 16 * 2**20
CHECKPOINT_BATCH_BYTES = 128 * 2**20
