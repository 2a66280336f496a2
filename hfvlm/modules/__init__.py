"""Parts that the architectures share. A part is here when three architectures need it unchanged, or when it is known
by a name of its own, as a VQGAN is, and others than one release build on it."""
