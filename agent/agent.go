// Package agent is a node: it mounts the file system over the engine, ships the
// records to the hub, and answers the commands.
package agent
