"""pagedgen: generates, verifies, autotunes and packs paged-attention kernels."""

__version__ = "0.1.0"
