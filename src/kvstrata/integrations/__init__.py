"""Engines that kvstrata plugs into, one module each, imported only by those who use them."""
