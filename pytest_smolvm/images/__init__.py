"""Images: kernels and root disks, built once and cached."""
