#!/usr/bin/env python3
"""Compare selective output with its baselines: `new-llm experiment-selective`."""

import sys

from launch import launch

if __name__ == "__main__":
    sys.exit(launch("experiment-selective"))
