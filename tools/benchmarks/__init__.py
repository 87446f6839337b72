# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of tools/bench, one file each (see common.py)."""
