// Package tlsfiles makes TLS configurations of PEM files: a server's, which
// follows its files while it runs, and a client's.
package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/reload"
)

// A Server is the TLS of a server. It is safe for concurrent use.
type Server struct {
	clientAuth tls.ClientAuthType
	files      *reload.Source[contents]
}

type contents struct {
	cert    *tls.Certificate
	clients *x509.CertPool // nil: clients show no certificate
}

// ServerFiles name the PEM files of a server.
type ServerFiles struct {
	Cert, Key string
	ClientCA  string // may be empty: clients are not asked for a certificate
	// Required refuses clients without a certificate of ClientCA in the handshake;
	// else only those are refused whose certificate is a bad one.
	Required bool
}

// NewServer reads the files.
func NewServer(f ServerFiles, log *slog.Logger) (*Server, error) {
	s := &Server{clientAuth: tls.NoClientCert}
	switch {
	case f.ClientCA != "" && f.Required:
		s.clientAuth = tls.RequireAndVerifyClientCert
	case f.ClientCA != "":
		s.clientAuth = tls.VerifyClientCertIfGiven
	}
	var err error
	s.files, err = reload.New("the TLS certificate", log, func() (contents, error) {
		return readServer(f)
	}, f.Cert, f.Key, f.ClientCA)
	return s, err
}

func readServer(f ServerFiles) (c contents, err error) {
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return c, fmt.Errorf("certificate %s with key %s: %w", f.Cert, f.Key, err)
	}
	c.cert = &pair
	if f.ClientCA != "" {
		c.clients, err = pool(f.ClientCA)
	}
	return c, err
}

// Config returns the configuration to serve with. It asks the files anew in each
// handshake.
func (s *Server) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c := s.files.Get()
			return &tls.Config{
				MinVersion:   tls.VersionTLS12,
				NextProtos:   []string{"h2", "http/1.1"},
				Certificates: []tls.Certificate{*c.cert},
				ClientAuth:   s.clientAuth,
				ClientCAs:    c.clients,
				// A resumed session would outlive a change of the CA.
				SessionTicketsDisabled: true,
			}, nil
		},
	}
}

// VerifyClient checks the certificate that a client has shown against the client
// CA as it is now, and returns it; nil where it showed none.
func (s *Server) VerifyClient(state *tls.ConnectionState) (*x509.Certificate, error) {
	if s == nil || state == nil || len(state.PeerCertificates) == 0 {
		return nil, nil
	}
	clients := s.files.Get().clients
	if clients == nil {
		return nil, nil
	}
	others := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		others.AddCert(cert)
	}
	leaf := state.PeerCertificates[0]
	_, err := leaf.Verify(x509.VerifyOptions{Roots: clients, Intermediates: others, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return leaf, err
}

// Problem says why the files as they are now are not in force, nil if they are.
func (s *Server) Problem() error {
	if s == nil {
		return nil
	}
	if err := s.files.Err(); err != nil {
		return err
	}
	if leaf := s.files.Get().cert.Leaf; leaf != nil && time.Now().After(leaf.NotAfter) {
		return fmt.Errorf("the certificate ended on %s: renew it", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Client reads the files of a client: ca with the CAs to trust (empty: the
// system's), cert and key with what to show (empty: nothing).
func Client(ca, cert, key string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	var err error
	if ca != "" {
		if cfg.RootCAs, err = pool(ca); err != nil {
			return nil, err
		}
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("certificate %s with key %s: %w", cert, key, err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// pool reads a PEM file of CAs.
func pool(file string) (*x509.CertPool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("CA %s: holds no certificate in PEM form", file)
	}
	return p, nil
}

// UnknownCA reports whether err says that a server's certificate is of no CA that
// the client trusts.
func UnknownCA(err error) bool {
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &unknown)
}

// CertificateFault reports whether err is about the certificate of a server: asking
// in another way cannot help.
func CertificateFault(err error) bool {
	var verify *tls.CertificateVerificationError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	return UnknownCA(err) || errors.As(err, &verify) || errors.As(err, &host) || errors.As(err, &invalid)
}
