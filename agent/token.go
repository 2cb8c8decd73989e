package agent

import (
	"fmt"
	"os"
	"strings"
)

// maxToken bounds a token's text in bytes.
const maxToken = 4096

// ReadToken returns the token in a file, "" for file "".
func ReadToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("hub.token-file: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if err := CheckToken(token); err != nil {
		return "", fmt.Errorf("hub.token-file: %s: %w", file, err)
	}
	return token, nil
}

// CheckToken returns an error for a text that no hub has made.
func CheckToken(token string) error {
	if token == "" || len(token) > maxToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("holds no token: one line of %d characters at most, as 'litefs-agent hub token add' prints it", maxToken)
	}
	return nil
}
