"""`weft doctor`: what this machine offers, what every plug-in can do on it, and what to do about what is broken."""
