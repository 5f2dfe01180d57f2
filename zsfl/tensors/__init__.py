"""Tensors as bytes: shapes and bounds (`spec`), packing and its price (`codec`)."""
