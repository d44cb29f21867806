"""What can be said about the Triton kernels without a GPU: launches, resources, a static model.

Nothing here runs a kernel and no number here is a time. ``python -m profiling.kernel_report``
prints the report; ``make kernel-report`` writes the one that the tests compare with.
"""
