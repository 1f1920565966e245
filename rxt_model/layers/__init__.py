"""Building blocks of decoder and encoder: attention, feed-forward, mixture of experts, norms, rotary positions."""
