"""Masks, lists and labels from what was downloaded or exported."""
