package fuse_test

func calls(args []string) int { return 0 }
