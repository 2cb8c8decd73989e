package testrig

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A CA makes certificates for tests.
type CA struct {
	tb   testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	dir  string
	File string // its own certificate, PEM
	n    int64
}

// NewCA makes a CA whose files are in a folder of the test.
func NewCA(tb testing.TB, name string) *CA {
	tb.Helper()
	ca := &CA{tb: tb, dir: tb.TempDir(), key: newKey(tb), n: time.Now().UnixNano()}
	ca.cert = &x509.Certificate{
		SerialNumber: big.NewInt(ca.n), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca.cert, ca.cert, &ca.key.PublicKey, ca.key)
	if err != nil {
		tb.Fatal(err)
	}
	ca.File = filepath.Join(ca.dir, "ca.pem")
	writePEM(tb, ca.File, "CERTIFICATE", der)
	return ca
}

// Server writes a certificate and its key for loopback, NAME.pem and NAME.key.
func (ca *CA) Server(name string) (cert, key string) {
	ca.tb.Helper()
	return ca.issue(name, &x509.Certificate{
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// Client writes a node's certificate and its key; names are DNS names.
func (ca *CA) Client(name string, names ...string) (cert, key string) {
	ca.tb.Helper()
	return ca.issue(name, &x509.Certificate{DNSNames: names, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
}

func (ca *CA) issue(name string, template *x509.Certificate) (cert, key string) {
	ca.tb.Helper()
	ca.n++
	template.SerialNumber, template.Subject = big.NewInt(ca.n), pkix.Name{CommonName: name}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	k := newKey(ca.tb)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &k.PublicKey, ca.key)
	if err != nil {
		ca.tb.Fatal(err)
	}
	text, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		ca.tb.Fatal(err)
	}
	cert, key = filepath.Join(ca.dir, name+".pem"), filepath.Join(ca.dir, name+".key")
	writePEM(ca.tb, cert, "CERTIFICATE", der)
	writePEM(ca.tb, key, "EC PRIVATE KEY", text)
	return cert, key
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func writePEM(tb testing.TB, file, kind string, der []byte) {
	tb.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		tb.Fatal(err)
	}
}
