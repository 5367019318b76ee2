"""Benchmarks: what skipping zeros gains, and where it does not.

- :mod:`ffn` times the FFN sites, dense against sparse, for a grid of sizes;
- :mod:`gemm` times the 2:4 product alone, against every other kernel for it;
- :mod:`pack` times the preparation of data (2:4 packing, row-contiguous weights);
- :mod:`compile` times compilation itself;
- :mod:`plot` draws the rows written by :mod:`ffn`.

Every row is one JSON object holding the two medians, their ratio, the 95 % interval of
the ratio, and what is needed to judge it: the machine, the versions, the commit, the
protocol.
"""
