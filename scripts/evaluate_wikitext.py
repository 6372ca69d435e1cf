#!/usr/bin/env python3
"""Perplexity on WikiText-2: `new-llm evaluate-wikitext`."""

import sys

from launch import launch

if __name__ == "__main__":
    sys.exit(launch("evaluate-wikitext"))
