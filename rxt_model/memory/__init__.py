"""Short-term memory and the network that writes to it."""

from rxt_model.memory.memory_attention import MemoryAttentionNetwork
from rxt_model.memory.read_by_updates import ReadByUpdates
from rxt_model.memory.short_term_memory import INITIALISATIONS, MemoryUpdateError, ShortTermMemory

__all__ = ["INITIALISATIONS", "MemoryAttentionNetwork", "MemoryUpdateError", "ReadByUpdates", "ShortTermMemory"]
