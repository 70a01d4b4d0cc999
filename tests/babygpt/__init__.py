"""Tests of BabyGPT."""
