"""Artifacts in stores: bundles as OCI artifacts, in a folder or a registry, signed, listed, pushed and pulled."""
