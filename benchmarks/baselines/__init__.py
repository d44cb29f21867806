"""What the benchmarks compare with: plain torch, padded and masked."""
