// Package hub is a hub: it takes the records of its nodes, makes them durable,
// and keeps every database with its history.
package hub
