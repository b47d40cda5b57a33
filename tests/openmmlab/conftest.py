"""mmengine's default scope, mmdet or mmseg by the test module's name, which the other one's tests have changed."""
import importlib

import pytest


@pytest.fixture(autouse=True)
def scope(request):
    package = {"test_detection": "mmdet", "test_segmentation": "mmseg"}.get(
        request.module.__name__.removesuffix("_config"))
    if package:
        importlib.import_module(f"{package}.utils").register_all_modules()
