"""What a Hugging Face model consists of; moves nothing, needs no data."""
