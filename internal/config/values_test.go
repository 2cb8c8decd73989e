package config_test

import (
	"encoding"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/config"
)

// value is what the types of this package have in common.
type value interface {
	encoding.TextMarshaler
	encoding.TextUnmarshaler
}

func TestValues(t *testing.T) {
	tests := []struct {
		name string
		into value
		text string
		want string // as printed; empty: refused
	}{
		{"seconds", new(config.Duration), "10s", "10s"},
		{"minutes", new(config.Duration), "300s", "5m"},
		{"hours", new(config.Duration), "1h", "1h"},
		{"mixed", new(config.Duration), "1h0m5s", "1h0m5s"},
		{"a day", new(config.Duration), "24h", "24h"},
		{"days", new(config.Duration), "90d", "90d"},
		{"no time", new(config.Duration), "0s", "0s"},
		{"too many days", new(config.Duration), "200000d", ""},
		{"no unit", new(config.Duration), "10", ""},
		{"negative", new(config.Duration), "-1s", ""},
		{"bytes", new(config.Size), "512", "512"},
		{"bytes with unit", new(config.Size), "512B", "512"},
		{"KiB", new(config.Size), "96KiB", "96KiB"},
		{"MiB", new(config.Size), "1024 MiB", "1GiB"},
		{"zero", new(config.Size), "0", "0"},
		{"the largest", new(config.Size), "9223372036854775807", "9223372036854775807"},
		{"overflow", new(config.Size), "8388608TiB", ""},
		{"thousands", new(config.Size), "5MB", ""},
		{"negative size", new(config.Size), "-1", ""},
		{"empty size", new(config.Size), "", ""},
		{"mode", new(config.Mode), "0660", "0660"},
		{"mode of a folder", new(config.Mode), "2770", "2770"},
		{"no octal", new(config.Mode), "0680", ""},
		{"app", new(config.Durability), "app", "app"},
		{"commit", new(config.Durability), "commit", "commit"},
		{"late", new(config.Durability), "5s", "5s"},
		{"never", new(config.Durability), "0s", ""},
		{"no word", new(config.Durability), "always", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.into.UnmarshalText([]byte(tt.text))
			if tt.want == "" {
				if err == nil {
					t.Errorf("%q was accepted", tt.text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := tt.into.MarshalText(); err != nil || string(got) != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestDurationRoundTrip(t *testing.T) {
	for _, d := range []time.Duration{1, time.Millisecond, time.Minute, 90 * time.Minute, 25 * time.Hour, 48 * time.Hour, 100 * 365 * 24 * time.Hour} {
		text := config.Duration(d).String()
		var got config.Duration
		if err := got.UnmarshalText([]byte(text)); err != nil || got.Std() != d {
			t.Errorf("%v as %q: got %v, %v", d, text, got, err)
		}
	}
}
