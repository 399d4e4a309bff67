"""Compiled parts: rings, engine, consumer protocol. Each .pxd is its table of contents."""
