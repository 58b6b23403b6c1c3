"""Extras that the package does not depend on: steering of correctors."""
