package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/tlsfiles"
	"github.com/litefs-agent/litefs-agent/transport"
)

func newJoin(a *app) *cobra.Command {
	j := agent.Join{Env: a.env, Identify: identify}
	cmd := &cobra.Command{
		Use:   "join [flags] URL TOKEN",
		Short: "enrol this node at a hub",
		Long: `join asks the hub at URL whom TOKEN names, which 'litefs-agent hub token add NODE'
has printed there, and writes url, token-file and the node's id into the
configuration, where everything else stays as it is. It prints the site. A node
that runs takes the new configuration when it is restarted. With - for TOKEN it is
read from standard input, so that no list of processes shows it.`,
		Example: "  litefs-agent join --ca /etc/litefs-agent/ca.pem https://hub.example:20202 2f1c...",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			j.URL, j.Token = args[0], args[1]
			if j.Token == "-" {
				line, err := bufio.NewReader(io.LimitReader(os.Stdin, 8<<10)).ReadString('\n')
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				j.Token = strings.TrimSpace(line)
			}
			done, err := j.Run(cmd.Context())
			if err != nil {
				return err
			}
			if done.Changed {
				fmt.Fprintf(a.stderr, "%s: node %s ships to hub %s; token in %s. Restart the node if it runs.\n", done.File, done.Node, done.Hub, done.TokenFile)
			} else {
				fmt.Fprintf(a.stderr, "%s: node %s ships to hub %s already\n", done.File, done.Node, done.Hub)
			}
			_, err = fmt.Fprintln(a.stdout, done.Site)
			return err
		},
	}
	cmd.Flags().StringVar(&j.File, "config", "", "configuration `FILE` (default "+agent.ConfigFile+")")
	cmd.Flags().StringVar(&j.CA, "ca", "", "PEM `FILE` of the CA of the hub's certificate (default: as configured, else the system's)")
	cmd.Flags().BoolVar(&j.Force, "force", false, "ship to this hub instead of the one that is configured")
	return cmd
}

// identify asks a hub whom the token names. Its errors name the cure.
func identify(ctx context.Context, url string, cfg agent.HubConfig, token string) (*transport.Identity, error) {
	d, err := newDialer(url, cfg, func() (string, error) { return token, nil })
	if err != nil {
		return nil, err
	}
	id, err := d.Identify(ctx)
	if err == nil {
		return id, nil
	}
	shown := config.Redact([]string{url})[0]
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	if bye, ok := errors.AsType[*transport.ByeError](err); ok {
		return nil, fmt.Errorf("%s: %s", shown, bye.Text)
	}
	switch {
	case tlsfiles.UnknownCA(err):
		return nil, fmt.Errorf("%s: its certificate is of no CA that is known here: name the file of its CA with --ca FILE (%w)", shown, err)
	case errors.As(err, &host):
		return nil, fmt.Errorf("%s: its certificate is for another name: use the name that it is for (%w)", shown, err)
	case errors.As(err, &invalid):
		return nil, fmt.Errorf("%s: its certificate is not good now: is the clock of this machine right? (%w)", shown, err)
	case strings.Contains(err.Error(), "HTTP response to HTTPS client"):
		return nil, fmt.Errorf("%s: there is no TLS at this port: use http://, on loopback, or [http] cert at the hub (%w)", shown, err)
	case strings.Contains(err.Error(), "HTTPS server"):
		return nil, fmt.Errorf("%s: there is TLS at this port: use https:// (%w)", shown, err)
	case unreachable(err):
		return nil, fmt.Errorf("%s: cannot be reached: does the hub run, is the name right, does every firewall let it through? (%w)", shown, err)
	}
	return nil, err
}

func unreachable(err error) bool {
	var dns *net.DNSError
	var timeout net.Error
	return errors.As(err, &dns) || errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH)
}
