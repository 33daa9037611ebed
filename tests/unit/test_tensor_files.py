"""Arrays in files: read back as they were, in whatever order they lay in memory."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_tensors

BLOCK = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "array", [BLOCK, np.asfortranarray(BLOCK), BLOCK.transpose(2, 0, 1), BLOCK[:, ::2], np.array(7)]
)
def test_arrays_come_back(tmp_path, array):
    write_tensors(tmp_path / "x.safetensors", {"a": array})
    found = load_file(tmp_path / "x.safetensors")["a"]
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert np.array_equal(found, array)
