"""One message in, one answer out: templates, sampling, decoding, and the state of a conversation."""
