//go:build nohub

package main

import "github.com/spf13/cobra"

func addHub(*app, *cobra.Command) {}

func hubConfigKind() *configKind { return nil }
