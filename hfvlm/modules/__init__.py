"""Parts that the architectures share. A part is here when three architectures need it unchanged."""
