#!/usr/bin/env python3
"""Train models on identical data and compare them: `new-llm experiment`."""

import sys

from launch import launch

if __name__ == "__main__":
    sys.exit(launch("experiment"))
