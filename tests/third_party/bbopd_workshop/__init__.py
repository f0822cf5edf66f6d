"""Plug-ins for bbopd, as a package of their own would bring them."""
