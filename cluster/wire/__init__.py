"""The protobuf stubs (generated from proto/) and the codec, the only module that imports them."""
