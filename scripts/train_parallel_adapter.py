#!/usr/bin/env python3
"""Train a parallel memory adapter on an existing Pythia: `new-llm train-adapter`."""

import sys

from launch import launch

if __name__ == "__main__":
    sys.exit(launch("train-adapter"))
