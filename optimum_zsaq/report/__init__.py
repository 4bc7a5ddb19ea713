"""Measurements of low-bit models."""
