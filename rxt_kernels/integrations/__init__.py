"""Drop-in backends for other libraries, one module each."""
