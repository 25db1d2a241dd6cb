"""Image sets, read a batch at a time in repeatable views: a function in a file each, giving `Data`."""
