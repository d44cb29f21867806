"""Adapters for other libraries, one module each; importing one changes nothing until `register`."""
