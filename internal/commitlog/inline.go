package commitlog

// Inline returns o for a log without goroutines of its own, so that the order of
// disk operations repeats: for tests.
func (o Options) Inline() Options {
	o.inline = true
	return o
}
